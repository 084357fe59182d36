"""How the models that come with the library are made and judged.

They are ``StableDiffusionPipeline`` folders of a few megabytes that make text-to-3D run anywhere.
``pocket.shapes`` is the world of the model ``pocket-shapes``; beside it lies what the making of any
model shares. This package imports neither the host (``threestudio``) nor the study
(``evaluation``).
"""
