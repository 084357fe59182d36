"""``lods studio``: a web page that makes objects, with a queue of runs and a gallery of results.

- :mod:`~lods.studio.choices`: what the form offers, and what it may ask for
- :mod:`~lods.studio.shelf`: the folders of runs; :mod:`~lods.studio.records`: what their files say;
  :mod:`~lods.studio.progress`: how far each is
- :mod:`~lods.studio.queue`: which run is next, its process, and those of exports
- :mod:`~lods.studio.work`: the process of a run
- :mod:`~lods.studio.server`, :mod:`~lods.studio.guard`, :mod:`~lods.studio.live`: HTTP
- ``assets/``: the page, in plain HTML, CSS and JavaScript; the viewer of objects is the host's
  (``threestudio.run.drawing``)

All state is in the folders of the runs. Only the server imports aiohttp.
"""
