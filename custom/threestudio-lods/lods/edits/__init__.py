"""Edits of pictures by a text (``lods edit``), with the methods of :mod:`lods.methods.editing`."""
