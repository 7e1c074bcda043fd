"""The HTML report on a checkpoint: who looked at what, when and with which figures, for whoever signs it off."""
