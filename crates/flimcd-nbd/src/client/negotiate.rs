//! The client's side of the handshake.

use std::io::{Read, Write};

use super::ClientError;
use crate::proto::{
    BASE_ALLOCATION, GREETING_MAGIC, NAME_BYTES_MAX, OPTION_MAGIC, OPTION_REPLY_BYTES,
    OPTION_REPLY_MAGIC, Reader, handshake, info, option, reply,
};

/// Longest answer to an option that is believed.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// Most exports in a list that are believed.
const EXPORTS_MAX: usize = 10_000;

pub(super) struct Agreed {
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) allocation: bool,
}

/// Chooses `export`, with structured replies and block status if the server has them.
pub(super) fn negotiate<S: Read + Write>(
    socket: &mut S,
    export: &str,
) -> Result<Agreed, ClientError> {
    greet(socket)?;
    send(socket, option::STRUCTURED_REPLY, &[])?;
    let structured = last_answer(socket, option::STRUCTURED_REPLY)? == reply::ACK;
    let mut allocation = false;
    if structured {
        let mut data = text(export);
        data.extend(1u32.to_be_bytes());
        data.extend(text(BASE_ALLOCATION));
        send(socket, option::SET_META_CONTEXT, &data)?;
        while answer(socket, option::SET_META_CONTEXT)?.0 == reply::META_CONTEXT {
            allocation = true;
        }
    }
    let mut data = text(export);
    data.extend(0u16.to_be_bytes());
    send(socket, option::GO, &data)?;
    let mut found = None;
    loop {
        let (kind, body) = answer(socket, option::GO)?;
        match kind {
            reply::INFO => {
                let mut reader = Reader(&body);
                if reader.u16() == Some(info::EXPORT)
                    && let (Some(size), Some(flags)) = (reader.u64(), reader.u16())
                {
                    found = Some(Agreed {
                        size,
                        flags,
                        allocation,
                    });
                }
            }
            reply::ACK => {
                return found.ok_or(ClientError::Protocol("the server did not tell the size"));
            }
            reply::ERR_UNKNOWN => return Err(ClientError::NoSuchExport(export.to_owned())),
            _ => return Err(ClientError::Protocol("the server refuses the export")),
        }
    }
}

/// Names of all exports.
pub(super) fn list<S: Read + Write>(socket: &mut S) -> Result<Vec<String>, ClientError> {
    greet(socket)?;
    send(socket, option::LIST, &[])?;
    let mut names = Vec::new();
    loop {
        let (kind, body) = answer(socket, option::LIST)?;
        match kind {
            reply::SERVER if names.len() < EXPORTS_MAX => {
                let name = Reader(&body)
                    .text()
                    .filter(|name| name.len() <= NAME_BYTES_MAX);
                let name = name.ok_or(ClientError::Protocol("an export has a malformed name"))?;
                names.push(name.to_owned());
            }
            reply::ACK => break,
            _ => {
                return Err(ClientError::Protocol(
                    "the server refuses to list its exports",
                ));
            }
        }
    }
    send(socket, option::ABORT, &[])?;
    Ok(names)
}

fn greet<S: Read + Write>(socket: &mut S) -> Result<(), ClientError> {
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting)?;
    let mut reader = Reader(&greeting);
    let magic = (reader.u64(), reader.u64());
    let flags = reader.u16().unwrap_or(0);
    if magic != (Some(GREETING_MAGIC), Some(OPTION_MAGIC)) {
        return Err(ClientError::Protocol(
            "no NBD server, or one from before 2010",
        ));
    }
    if flags & handshake::FIXED_NEWSTYLE == 0 {
        return Err(ClientError::Protocol(
            "the server has no fixed newstyle handshake",
        ));
    }
    let known = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
    Ok(socket.write_all(&u32::from(flags & known).to_be_bytes())?)
}

fn text(text: &str) -> Vec<u8> {
    let mut data = u32::try_from(text.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes()
        .to_vec();
    data.extend(text.as_bytes());
    data
}

fn send<S: Write>(socket: &mut S, number: u32, data: &[u8]) -> Result<(), ClientError> {
    let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend(number.to_be_bytes());
    message.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    message.extend(data);
    Ok(socket.write_all(&message)?)
}

fn last_answer<S: Read>(socket: &mut S, number: u32) -> Result<u32, ClientError> {
    Ok(answer(socket, number)?.0)
}

/// Type and data of one answer to option `number`.
fn answer<S: Read>(socket: &mut S, number: u32) -> Result<(u32, Vec<u8>), ClientError> {
    const WRONG: ClientError = ClientError::Protocol("malformed answer to an option");
    let mut head = [0; OPTION_REPLY_BYTES];
    socket.read_exact(&mut head)?;
    let mut reader = Reader(&head);
    if reader.u64() != Some(OPTION_REPLY_MAGIC) || reader.u32() != Some(number) {
        return Err(WRONG);
    }
    let (Some(kind), Some(length)) = (reader.u32(), reader.u32()) else {
        return Err(WRONG);
    };
    if length as usize > ANSWER_BYTES_MAX {
        return Err(WRONG);
    }
    let mut body = vec![0; length as usize];
    socket.read_exact(&mut body)?;
    Ok((kind, body))
}
