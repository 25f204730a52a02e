import uuid
from typing import Any

from fastapi import APIRouter, HTTPException

from app.api.deps import CurrentUser, SessionDep
from app.models import Item, ItemBase, ItemPublic, Message

router = APIRouter(prefix="/items", tags=["items"])


@router.post("/", response_model=ItemPublic)
def create_item(*, session: SessionDep, current_user: CurrentUser, item_in: ItemBase) -> Any:
    item = Item.model_validate(item_in, update={"owner_id": current_user.id})
    session.add(item)
    session.commit()
    session.refresh(item)
    return item


@router.get("/{item_id}", response_model=ItemPublic)
def read_item(session: SessionDep, current_user: CurrentUser, item_id: uuid.UUID) -> Any:
    item = session.get(Item, item_id)
    if not item:
        raise HTTPException(404, "Item not found")
    if not current_user.is_superuser and item.owner_id != current_user.id:
        raise HTTPException(403, "Not enough permissions")
    return item


@router.delete("/{item_id}")
def delete_item(session: SessionDep, current_user: CurrentUser, item_id: uuid.UUID) -> Message:
    session.delete(read_item(session, current_user, item_id))
    session.commit()
    return Message(message="Item deleted successfully")
