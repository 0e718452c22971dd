"""Documents that the repository draws itself, with questions and exact answers; training and evaluation share them."""
