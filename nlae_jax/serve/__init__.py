"""Serves a pair over HTTP: the interface of Neuronpedia's NLA server, and a page that shows explanations."""
