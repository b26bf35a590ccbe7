"""Scores of an embedding, apart from ``streamx.metrics``: a benchmark does not trust what it tests.

Labels come from a uniform vote of the 15 nearest labelled reference cells, ties to the first label in
sorted order; balanced accuracy and macro F1 run over the classes that the query holds; cells labelled
unknown neither vote nor count. Mixing scores use all cells: SCALEX's batch entropy mixing (ceiling ln 2),
LISI over 90 neighbours scaled as scib does, and the share of the 30 nearest cells that come from the own
batch. Brute-force exact search.
"""

from __future__ import annotations

import numpy as np
from sets import UNLABELED
from sklearn.metrics import f1_score, silhouette_score
from sklearn.neighbors import NearestNeighbors

LISI_OTHERS = 89  # scib's 90 neighbours count the cell itself


def labelled(labels: np.ndarray) -> np.ndarray:
    """Mask of the cells that have a label."""
    return ~np.isin(labels, UNLABELED)


def vote(
    latent_reference: np.ndarray, labels: np.ndarray, latent_query: np.ndarray, k: int = 15
) -> np.ndarray:
    """Label of each query cell by uniform vote; ties go to the label that sorts first."""
    keep = labelled(labels)
    names, code = np.unique(labels[keep], return_inverse=True)
    search = NearestNeighbors(n_neighbors=min(k, len(code))).fit(latent_reference[keep])
    nearest = code[search.kneighbors(latent_query, return_distance=False)]
    votes = np.stack([(nearest == i).sum(axis=1) for i in range(len(names))], axis=1)
    return names[votes.argmax(axis=1)]


def label_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, balanced accuracy and macro F1 over the classes of ``truth``."""
    keep = labelled(truth)
    truth, predicted = truth[keep], predicted[keep]
    classes = np.unique(truth)
    outside = np.where(np.isin(predicted, classes), predicted, "other")  # recall is untouched by this
    return {
        "n_labelled": len(truth),
        "accuracy": float((truth == predicted).mean()),
        "balanced_accuracy": float(np.mean([(predicted[truth == c] == c).mean() for c in classes])),
        "macro_f1": float(f1_score(truth, outside, labels=classes, average="macro", zero_division=0)),
    }


def neighbours(latent: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices of the ``k`` nearest other cells of every cell."""
    k = min(k, len(latent) - 1)
    distance, index = NearestNeighbors(n_neighbors=k + 1).fit(latent).kneighbors(latent)
    own = index == np.arange(len(latent))[:, None]
    own[~own.any(axis=1), -1] = True  # exact duplicates may push the cell itself out of its list
    return distance[~own].reshape(-1, k), index[~own].reshape(-1, k)


def batch_entropy_mixing(index: np.ndarray, batches: np.ndarray, k: int = 100, seed: int = 0) -> float:
    """SCALEX's score: 100 pools of 100 cells drawn with replacement, entropies weighted by batch size."""
    names, code = np.unique(batches, return_inverse=True)
    nearest = code[index[:, :k]]
    share = np.stack([(nearest == i).mean(axis=1) for i in range(len(names))], axis=1)
    share /= np.bincount(code) / len(code)
    share /= share.sum(axis=1, keepdims=True)
    entropy = -(share * np.log(share + 1e-8)).sum(axis=1)
    drawn = np.random.default_rng(seed).choice(len(code), size=(100, 100))
    return float(entropy[drawn].mean() / np.log2(len(names)))


def lisi(distance: np.ndarray, index: np.ndarray, labels: np.ndarray, perplexity: float = 30.0) -> np.ndarray:
    """Inverse Simpson index of every cell's neighbourhood (Korsunsky 2019); the kernel width by bisection."""
    names, code = np.unique(labels, return_inverse=True)
    n = len(distance)
    beta, low, high = np.ones(n), np.zeros(n), np.full(n, np.inf)
    shifted = distance - distance[:, :1]
    for _ in range(60):
        weight = np.exp(-shifted * beta[:, None])
        total = weight.sum(axis=1)
        entropy = np.log(total) + beta * (shifted * weight).sum(axis=1) / total
        above = entropy > np.log(perplexity)
        low, high = np.where(above, beta, low), np.where(above, high, beta)
        beta = np.where(np.isinf(high), beta * 2, (low + np.where(np.isinf(high), 0, high)) / 2)
    weight = np.exp(-shifted * beta[:, None])
    weight /= weight.sum(axis=1, keepdims=True)
    nearest = code[index]
    simpson = sum(np.square((weight * (nearest == i)).sum(axis=1)) for i in range(len(names)))
    return 1.0 / np.asarray(simpson)


def mixing_scores(latent: np.ndarray, batches: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """EBM, iLISI, cLISI, same-batch share, silhouette of the labels, and what perfect mixing would give."""
    distance, index = neighbours(latent, 100)
    _, code = np.unique(batches, return_inverse=True)
    n_batches = code.max() + 1
    share = np.bincount(code) / len(code)
    spread = lisi(distance[:, :LISI_OTHERS], index[:, :LISI_OTHERS], batches)
    scores = {
        "n_cells": len(latent),
        "ebm": batch_entropy_mixing(index, batches),
        "ilisi": float((np.median(spread) - 1) / (n_batches - 1)),
        "same_batch": float((code[index[:, :30]] == code[:, None]).mean()),
        "same_batch_mixed": float(np.square(share).sum()),
    }
    keep = labelled(labels)
    if keep.any() and len(np.unique(labels[keep])) > 1:
        near, at = neighbours(latent[keep], LISI_OTHERS)
        n_labels = len(np.unique(labels[keep]))
        scores["clisi"] = float((n_labels - np.median(lisi(near, at, labels[keep]))) / (n_labels - 1))
        scores["asw_label"] = float((silhouette_score(latent[keep], labels[keep]) + 1) / 2)
    return scores


def score(
    latent: np.ndarray, batches: np.ndarray, labels: np.ndarray, queries: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """All scores: for the queries together, and for each query with the reference alone if there are several.

    Parameters
    ----------
    latent : (n_cells, n_latent) of reference and queries
    batches, labels : (n_cells,) str
    queries : batches whose labels are predicted; all other cells are the reference
    """
    views = {"+".join(queries): queries}
    if len(queries) > 1:
        views |= {name: (name,) for name in queries}
    is_query = np.isin(batches, queries)
    result = {}
    for view, members in views.items():
        asked = np.isin(batches, members)
        here = ~is_query | asked
        predicted = vote(latent[~is_query], labels[~is_query], latent[asked])
        result[view] = {
            **label_scores(labels[asked], predicted),
            **mixing_scores(latent[here], batches[here], labels[here]),
        }
    return result
