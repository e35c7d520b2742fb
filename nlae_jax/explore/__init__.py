"""Explores a trained pair: explanations of selected tokens, directions and neurons, steering, audits, comparisons."""
