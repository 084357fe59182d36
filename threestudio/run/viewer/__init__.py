"""The live view of a run, in a browser (``--viewer``, ``lods view``), by viser.

- :mod:`.options`: what the command line says of it. The only part that is imported without it.
- :mod:`.door`: who may connect, and which messages are heard.
- :mod:`.server`: viser's server behind that door, and ``viewer.json``.
- :mod:`.frames`: pictures from a visitor's camera, drawn without disturbing the training.
- :mod:`.budget`: how much of the time the view may take.
- :mod:`.visitors`: who is there, and what each of them is to be sent next.
- :mod:`.curves`: losses and counts over the steps.
- :mod:`.progress`: those of a training, and how far it is, in words.
- :mod:`.saving`: snapshots and exports.
- :mod:`.training_cameras`: where the last batch was seen from, and its pictures.
- :mod:`.panel`: the controls.
- :mod:`.live`: all of it together, called by the training between its steps.
- :mod:`.callback`: that, as a callback of Lightning.
"""
