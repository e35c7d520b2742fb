"""A pair over HTTP: the interface of Neuronpedia's NLA server, and a page to look at explanations with."""
