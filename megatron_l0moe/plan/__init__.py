"""`l0moe plan`: what a run takes in memory, time and disk, and which layouts fit. No torch."""
