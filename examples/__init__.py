"""The same small application twice, for Starlette and for Flask."""
