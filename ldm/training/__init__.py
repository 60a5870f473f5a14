"""Lightning modules, EMA, learning-rate schedules and callbacks."""
