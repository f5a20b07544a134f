"""Generation: scheduler, runner, sampling, engine."""
