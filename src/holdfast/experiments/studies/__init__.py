"""Published experiments as plans of runs."""
