"""The world of shapes and its model ``pocket-shapes``: scenes, renderer, captions, training, judge.

Twenty kinds of objects are put together from a few primitives with random proportions, seen in
pictures of 64 pixels.
"""
