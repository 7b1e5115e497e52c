"""The demo: an app, labellers and an on-call play one day and two nights against a real installation, from outside."""
