"""`nlae plan`: finds the memory and time of a config's real steps on a TPU pod by compiling them, without the pod."""
