"""What a run survives: `python -m bench.faults ATTACK` attacks real runs and prints what was lost."""
