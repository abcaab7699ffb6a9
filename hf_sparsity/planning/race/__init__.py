"""Let many plans compete on calibration text and keep the best."""
