"""What lets a run survive: checkpoints, signals, guards, the watchdog, one folder for all it leaves."""
