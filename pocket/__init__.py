"""How the pocket prior is made and judged: scenes, renderer, captions, training, judge.

The pocket prior is a few-megabyte ``StableDiffusionPipeline`` folder that makes text-to-3D run
anywhere. This package imports neither the host nor the extension.
"""
