"""`nlae plan`: what the real steps of a config take on a TPU pod, found out by compiling them, without one."""
