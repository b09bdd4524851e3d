"""The methods that a dense model can be changed by, a file for each: what the chain asks of them. No torch."""
