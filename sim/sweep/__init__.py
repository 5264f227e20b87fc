"""Many runs: axes, the journal that resumes them, where they run, and how they compare."""
