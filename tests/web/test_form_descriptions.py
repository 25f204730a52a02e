"""What FastAPI's documentation says of a form that a dependency receives, and its 422 for what the form lacks."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Form as FastAPIForm
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from openapi_spec_validator import validate
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from granite_storage import Attachment, ConfigurationError, attachment
from granite_storage.testing import BoundStorage, bound_storage
from granite_storage.web import (
    FileList,
    MissingFieldError,
    UploadForm,
    install_error_handlers,
    stream_upload,
    upload_body,
    upload_form,
)

FILE = {"type": "string", "format": "binary"}
TEXT = {"type": "string"}
MISSING = {"type": "missing", "msg": "Field required", "input": None}


class Base(DeclarativeBase):
    pass


class Profile(Base):
    __tablename__ = "profile"
    id: Mapped[int] = mapped_column(primary_key=True)
    avatar: Mapped[Attachment | None] = attachment("avatars")
    photo: Mapped[Attachment | None] = attachment("photos")


TARGETS: dict[str, Any] = {"avatar": Profile.avatar, "photos": FileList(Profile.photo, 3)}
Form = Annotated[UploadForm, Depends(upload_form(TARGETS, fields=["title"], required=["avatar", "name"]))]


async def inner(form: Form) -> UploadForm:
    return form


def make_app() -> FastAPI:
    app, router = FastAPI(), APIRouter(prefix="/nested")
    install_error_handlers(app)

    @app.post("/profiles")
    async def create(form: Form) -> dict[str, Any]:
        return {name: file.size for name, file in form.files.items() if name == "avatar"} | dict(form.fields)

    @router.put("/profiles/{number}")
    async def replace(number: int, form: Annotated[UploadForm, Depends(inner)]) -> None: ...

    @app.put("/avatars")
    async def body(avatar: Annotated[Attachment, Depends(upload_body(Profile.avatar))]) -> None: ...

    @app.post("/albums")
    async def album(form: Annotated[UploadForm, Depends(upload_form(TARGETS, required=["photos"]))]) -> list[int]:
        return [photo.size for photo in form.files["photos"]]

    @app.post("/own", openapi_extra={"requestBody": {"content": {"text/plain": {}}}})
    async def own(form: Form) -> None: ...

    @app.post("/plain")
    async def plain(name: Annotated[str, FastAPIForm()]) -> None: ...

    @app.post("/hidden", include_in_schema=False)
    async def hidden(form: Form) -> None: ...

    app.include_router(router, prefix="/api")
    return app


@pytest.fixture
async def kit() -> AsyncIterator[BoundStorage]:
    async with bound_storage(Base) as kit:
        yield kit


@pytest.fixture
async def client(kit: BoundStorage) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app()), base_url="http://test") as client:
        yield client


def body_of(document: dict[str, Any], path: str, method: str = "post") -> dict[str, Any]:
    body = document["paths"][path][method]["requestBody"]
    return dict(body)


class TestDescription:
    async def test_forms(self, client: httpx.AsyncClient) -> None:
        document = (await client.get("/openapi.json")).json()
        validate(document)
        schema = {
            "type": "object",
            "properties": {
                "title": TEXT,
                "avatar": FILE,
                "name": TEXT,
                "photos": {"type": "array", "items": FILE, "maxItems": 3},
            },
            "required": ["avatar", "name"],
            "additionalProperties": TEXT,
        }
        described = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
        assert body_of(document, "/profiles") == described
        assert body_of(document, "/api/nested/profiles/{number}", "put") == described
        photos = body_of(document, "/albums")["content"]["multipart/form-data"]["schema"]["properties"]["photos"]
        assert photos == {"type": "array", "items": FILE, "maxItems": 3, "minItems": 1}
        answer = document["paths"]["/profiles"]["post"]["responses"]["422"]
        assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/HTTPValidationError"}

    async def test_an_endpoint_with_two_forms(self, kit: BoundStorage) -> None:
        """The body can be read once, so the application does not start, and has no document."""
        app = FastAPI()
        install_error_handlers(app)
        other = Annotated[UploadForm, Depends(upload_form({"photo": Profile.photo}))]

        async def both(form: Form, again: Annotated[UploadForm, Depends(inner)], other: Any) -> None: ...

        both.__annotations__["other"] = other
        app.add_api_route("/both", both, methods=["POST"])
        message = "2 dependencies of the endpoint '/both' receive its body, which can be read once"
        with pytest.raises(ConfigurationError, match=message):
            app.openapi()
        with pytest.raises(ConfigurationError, match=message):
            async with app.router.lifespan_context(app):
                pass
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
        ) as client:
            files = {"avatar": b"a"}
            assert (await client.post("/both", data={"name": "n"}, files=files)).status_code == 500
        assert await kit.objects() == []

    async def test_an_application_with_a_lifespan_of_its_own(self) -> None:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, int]]:
            yield {"own": 1}

        app = FastAPI(lifespan=lifespan)
        install_error_handlers(app)
        async with app.router.lifespan_context(app) as state:
            assert state == {"own": 1}

    async def test_bodies(self, client: httpx.AsyncClient) -> None:
        document = (await client.get("/openapi.json")).json()
        content = body_of(document, "/avatars", "put")["content"]
        assert content == {"application/octet-stream": {"schema": FILE}}

    async def test_others_stay_as_they_are(self, client: httpx.AsyncClient) -> None:
        document = (await client.get("/openapi.json")).json()
        assert list(body_of(document, "/own")["content"]) == ["text/plain"]
        assert list(body_of(document, "/plain")["content"]) == ["application/x-www-form-urlencoded"]
        assert "/hidden" not in document["paths"]

    async def test_a_route_that_is_added_later(self) -> None:
        app = make_app()
        assert "/late" not in app.openapi()["paths"]
        assert app.openapi() is app.openapi()

        @app.post("/late")
        async def late(form: Form) -> None: ...

        app.openapi_schema = None
        assert "requestBody" in app.openapi()["paths"]["/late"]["post"]

    def test_a_starlette_application_has_none(self) -> None:
        install_error_handlers(Starlette())


class TestMissing:
    async def test_the_response_is_that_of_fastapi(self, client: httpx.AsyncClient, kit: BoundStorage) -> None:
        response = await client.post("/profiles", data={"title": "x"}, files={"photos": ("a.png", b"photo")})
        assert (response.status_code, response.json()) == (
            422,
            {"detail": [{**MISSING, "loc": ["body", "avatar"]}, {**MISSING, "loc": ["body", "name"]}]},
        )
        assert await kit.objects() == []

    async def test_an_empty_text_and_an_empty_file_input(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/profiles", data={"name": ""}, files={"avatar": ("", b"")})
        assert [error["loc"] for error in response.json()["detail"]] == [["body", "avatar"], ["body", "name"]]

    async def test_of_a_urlencoded_form(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/profiles", data={"name": "x"})
        assert [error["loc"] for error in response.json()["detail"]] == [["body", "avatar"]]

    async def test_nothing(self, client: httpx.AsyncClient, kit: BoundStorage) -> None:
        response = await client.post("/profiles", data={"name": "x", "more": "y"}, files={"avatar": ("a.png", b"avatar")})
        assert (response.status_code, response.json()) == (200, {"avatar": 6, "name": "x", "more": "y"})
        assert await kit.objects() == []  # no row has taken it

    async def test_several_files(self, client: httpx.AsyncClient) -> None:
        files = [("photos", ("a.png", b"a")), ("photos", ("b.png", b"bb"))]
        assert (await client.post("/albums", files=files)).json() == [1, 2]
        response = await client.post("/albums", data={"name": "x"})
        assert [error["loc"] for error in response.json()["detail"]] == [["body", "photos"]]

    @pytest.mark.parametrize("photos", [{"files": {"photos": (None, "text")}}, {"data": {"photos": "text"}}])
    async def test_a_text_is_no_file(self, client: httpx.AsyncClient, photos: dict[str, Any]) -> None:
        response = await client.post("/albums", **photos)
        assert (response.status_code, [error["loc"] for error in response.json()["detail"]]) == (422, [["body", "photos"]])

    @pytest.mark.usefixtures("kit")
    async def test_a_handler_of_the_application_answers(self) -> None:
        app = make_app()

        @app.exception_handler(RequestValidationError)
        async def answer(_: Any, error: RequestValidationError) -> PlainTextResponse:
            return PlainTextResponse(str([one["loc"] for one in error.errors()]), status_code=418)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            response = await client.post("/profiles", data={"name": "x"})
        assert (response.status_code, response.text) == (418, "[('body', 'avatar')]")

    async def test_under_starlette(self, kit: BoundStorage) -> None:
        async def endpoint(request: Request) -> JSONResponse:
            await stream_upload(request, TARGETS, required=["avatar", "name"])
            raise AssertionError

        app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
        install_error_handlers(app)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            response = await client.post("/", files={"photos": ("a.png", b"photo")})
        assert response.headers["content-type"] == "application/problem+json"
        assert (response.status_code, response.json()["detail"]) == (422, "The form lacks 'avatar', 'name'.")
        assert await kit.objects() == []

    def test_the_error_is_pickled_with_its_names(self) -> None:
        error = pickle.loads(pickle.dumps(MissingFieldError("lacks", names=("a",))))  # noqa: S301
        assert (str(error), error.names) == ("lacks", ("a",))

    @pytest.mark.parametrize("names", ["avatar", None, 3])
    async def test_one_text_is_not_several_names(self, names: Any) -> None:
        for arguments in ({"required": names}, {"fields": names}):
            with pytest.raises(TypeError, match=f"{next(iter(arguments))} takes names of fields"):
                upload_form(TARGETS, **arguments)
