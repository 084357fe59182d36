"""Textured meshes on a CPU or a GPU, without a host."""
