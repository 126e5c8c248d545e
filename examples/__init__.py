"""Programs that train with the losses."""
