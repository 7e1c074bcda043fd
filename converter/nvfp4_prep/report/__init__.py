"""The HTML report on a checkpoint: what was checked, when, where and with which figures."""
