"""The commands of ``lods``, a module each, with ``main(argv, command) -> exit status``."""
