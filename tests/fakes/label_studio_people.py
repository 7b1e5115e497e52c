"""The people of the small Label Studio: their tokens of both kinds, and the invitation by which they sign up."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from aiohttp import web

SIGN_UP = "/user/signup/"
TOKEN_OF_SESSION = "/api/current-user/token"
REFRESH = "/api/token/refresh"
NEEDS_NO_TOKEN = (SIGN_UP, TOKEN_OF_SESSION, REFRESH)
PASSWORD_AT_LEAST = 8


@dataclass(frozen=True)
class Person:
    id: int
    email: str
    legacy: str


PERSON = web.RequestKey("person", Person)  # whose token came with the request


class People:
    """The first one is there from the start."""

    def __init__(self, email: str, token: str) -> None:
        self._people = [Person(1, email, token)]
        self._personal: dict[str, Person] = {}  # refresh tokens
        self._access: dict[str, Person] = {}
        self._sessions: dict[str, Person] = {}
        self._invitation, self._form = secrets.token_hex(8), secrets.token_hex(8)

    def who_asks(self, request: web.Request) -> Person | None:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind == "Bearer":
            return self._access.get(token)
        return next((one for one in self._people if kind == "Token" and one.legacy == token), None)

    def called(self, email: str) -> Person | None:
        return next((one for one in self._people if one.email == email), None)

    async def whoami(self, request: web.Request) -> Any:
        person = request[PERSON]
        return {"id": person.id, "email": person.email, "username": person.email}

    async def listed(self, _request: web.Request) -> Any:
        return [{"id": one.id, "email": one.email} for one in self._people]

    # tokens

    async def make_personal(self, request: web.Request) -> Any:
        token = ".".join(secrets.token_hex(8) for _ in range(3))
        self._personal[token] = request[PERSON]
        return web.json_response({"token": token}, status=201)

    async def refresh(self, request: web.Request) -> Any:
        person = self._personal.get((await request.json()).get("refresh", ""))
        if person is None:
            return web.json_response({"detail": "Token is invalid", "code": "token_not_valid"}, status=401)
        access = secrets.token_hex(16)
        self._access[access] = person
        return {"access": access}

    async def token_of_session(self, request: web.Request) -> Any:
        person = self._sessions.get(request.cookies.get("sessionid", "")) or request.get(PERSON)
        if person is None:
            return web.json_response({"detail": "Authentication credentials were not provided."}, status=401)
        return {"token": person.legacy}

    # signing up, as a browser does

    async def invite(self, _request: web.Request) -> Any:
        return {"invite_url": f"{SIGN_UP}?token={self._invitation}"}

    async def sign_up_page(self, _request: web.Request) -> web.Response:
        hidden = f'<input type="hidden" name="csrfmiddlewaretoken" value="{self._form}">'
        return web.Response(text=f"<form>{hidden}</form>", content_type="text/html")

    async def sign_up(self, request: web.Request) -> web.Response:
        """A form that it does not take comes back as a page."""
        form = {name: str(value) for name, value in (await request.post()).items()}
        known = request.query.get("token") == self._invitation and form.get("csrfmiddlewaretoken") == self._form
        fits = len(form.get("password", "")) >= PASSWORD_AT_LEAST and self.called(form.get("email", "")) is None
        if not (known and fits):
            return await self.sign_up_page(request)
        person = Person(len(self._people) + 1, form["email"], secrets.token_hex(20))
        session = secrets.token_hex(8)
        self._people.append(person)
        self._sessions[session] = person
        answer = web.Response(status=302, headers={"Location": "/projects/"})
        answer.set_cookie("sessionid", session)
        return answer
