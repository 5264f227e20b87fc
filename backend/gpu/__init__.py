"""The engine that executes steps on a GPU; the only folder that imports torch or CuPy."""
