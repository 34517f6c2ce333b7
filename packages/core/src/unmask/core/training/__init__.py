"""Training: the recipe, the loop, schedules, checkpoints and stages. Import the module you need."""
