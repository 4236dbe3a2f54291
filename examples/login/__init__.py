"""A small site with logins, once for Starlette and once for Flask: start with ``asgi_app.py``."""
