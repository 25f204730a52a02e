from granite_storage import Attachment, attachment, journal_tables
from granite_storage.derived import ImageVariant
from sqlalchemy import ForeignKey
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user_account"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str] = mapped_column(unique=True)
    token_hash: Mapped[str] = mapped_column(unique=True)
    is_admin: Mapped[bool] = mapped_column(default=False)
    avatar: Mapped[Attachment | None] = attachment(
        "avatars", variants={"icon": ImageVariant(fill=(64, 64))}
    )
    documents: Mapped[list["Document"]] = relationship(
        back_populates="owner", cascade="all, delete-orphan"
    )


class Document(Base):
    __tablename__ = "document"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int] = mapped_column(ForeignKey(User.id), index=True)
    is_shared: Mapped[bool] = mapped_column(default=False)
    file: Mapped[Attachment] = attachment(
        "documents", nullable=False, variants={"thumb": ImageVariant(fit=(200, 200))}
    )
    owner: Mapped[User] = relationship(back_populates="documents")


journal_tables(Base.metadata)
