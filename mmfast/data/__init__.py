"""Clips in and out: `video` reads files (PyAV, imported when first used), `synthetic` draws clips of a moving hand."""
