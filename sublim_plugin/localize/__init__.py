"""Which tokens, layers and modules carry a trait: gates, spectra, patching, divergence tokens."""
