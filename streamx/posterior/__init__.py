"""What a trained count model says about cells: functions of (module, minibatches) to arrays; no stores."""
