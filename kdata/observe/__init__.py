"""What a person sees of work that runs: progress, journal, energy, status, and how numbers are printed."""
