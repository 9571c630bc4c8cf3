"""The report of sweeps: one HTML page with images, plots and tables, and an image of the labelled grid."""
