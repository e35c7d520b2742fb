"""What people ask of a trained pair: explanations of what they select, directions and neurons, steering, audits."""
