"""How the pocket model is made and judged: scenes, renderer, captions, training, judge.

The pocket model is a few-megabyte ``StableDiffusionPipeline`` folder that makes text-to-3D run
anywhere. This package imports neither the host (``threestudio``) nor the study
(``evaluation``).
"""
