"""Atomic writing of files, progress bars, and the number of cores, for all parts of the package."""
