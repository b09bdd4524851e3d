"""From run folders to one HTML page and summary.json. No torch."""
