"""`recray search`: chooses settings of model and training by trials on the validation users."""
