"""What training and testing take: recipes, losses, schedules, the engine, evaluation and metrics."""
