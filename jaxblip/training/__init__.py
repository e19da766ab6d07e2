"""How a run goes: train state, optimizer, the step, checkpoints, metrics, progress."""
