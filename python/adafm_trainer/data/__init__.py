"""Image sets: reading folders and zip archives, drawing batches from them, writing picture grids."""
