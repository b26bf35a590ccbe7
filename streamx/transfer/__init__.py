"""Labels from a reference to a query through nearest neighbours in the latent space: arrays in, arrays out.

Two rules: the uniform vote of the 5 nearest (SCALEX's ``label_transfer``), and scArches' distance-weighted
vote of the 50 nearest (Lotfollahi 2022, Methods, "cell-type annotation"). Both also for labels of several
levels, each chosen within the coarser one; with thresholds that held-out reference cells set, and with a
score of how strange a cell is to the reference.
"""

from streamx.transfer.angle import directions
from streamx.transfer.ask import UNKNOWN, Transfer, transfer_labels, transfer_levels, vote
from streamx.transfer.held_out import HeldOut, Threshold, hold_out, threshold_for
from streamx.transfer.scores import score_labels
from streamx.transfer.voters import Voters, gather, voting_cells
from streamx.transfer.winners import kernel_weights

__all__ = [
    "UNKNOWN",
    "HeldOut",
    "Threshold",
    "Transfer",
    "Voters",
    "directions",
    "gather",
    "hold_out",
    "kernel_weights",
    "score_labels",
    "threshold_for",
    "transfer_labels",
    "transfer_levels",
    "vote",
    "voting_cells",
]
