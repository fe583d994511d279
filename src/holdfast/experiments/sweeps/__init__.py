"""Many runs at once: axes, cost, launchers."""
