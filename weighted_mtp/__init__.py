"""Exported from nbs/, flat: nbs/training/02_losses.ipynb is weighted_mtp.losses. Edit the notebooks, not this."""
__version__ = "0.1.0"
