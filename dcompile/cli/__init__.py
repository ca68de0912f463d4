"""The command line: ``dcompile demo``, ``explain``, ``profile`` and ``tune``."""
