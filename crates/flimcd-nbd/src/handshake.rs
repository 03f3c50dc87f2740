//! The server's side of the handshake, without I/O.
//!
//! [`Negotiation`] takes the client's bytes and appends the server's to a buffer, until the client
//! has chosen an export. The order: greeting, the client's flags, any number of options, of which
//! `GO` and `EXPORT_NAME` end it well and `ABORT` ends it for good. A malformed option gets the
//! protocol's error and the handshake goes on; what cannot be understood at all (a wrong magic
//! number, an unknown flag) ends the connection. Memory is taken for one option of at most
//! [`OPTION_BYTES_MAX`]; a longer one is skipped without being kept and answered with
//! `ERR_TOO_BIG`.

use crate::proto::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, GREETING_MAGIC, NAME_BYTES_MAX, OPTION_BYTES,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, Reader, export, handshake, info, option, reply,
};

/// Longest option that is looked at.
pub const OPTION_BYTES_MAX: usize = 16 << 10;
/// Longest option that is skipped; what claims more is no client.
const OPTION_BYTES_SKIPPED_MAX: u32 = 32 << 20;
/// Most options of one handshake.
const OPTIONS_MAX: u32 = 1000;

/// What the handshake must know of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Smallest sensible unit of requests in bytes, a power of two that divides the size.
    pub block_size_min: u32,
    /// Best unit of requests in bytes.
    pub block_size_preferred: u32,
    /// Longest request in bytes.
    pub request_bytes_max: u32,
}

/// The exports, as the handshake asks for them.
pub trait Catalogue {
    /// All names, in the order of the list that clients see.
    fn names(&self) -> Vec<String>;
    /// The export of this name; the empty name is the default export.
    fn find(&self, name: &str) -> Option<ExportInfo>;
}

/// What was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Name of the export, as the client gave it.
    pub name: String,
    /// The export.
    pub info: ExportInfo,
    /// Whether replies are structured.
    pub structured: bool,
    /// Whether the client may ask for block status in `base:allocation`.
    pub allocation: bool,
}

/// Why a connection ends without an export.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The client asked to end it.
    #[error("the client aborted the handshake")]
    Aborted,
    /// Not an NBD client.
    #[error("the client does not speak NBD (wrong magic number)")]
    Magic,
    /// The client wants something from the future.
    #[error("the client sets unknown flags {0:#x}")]
    Flags(u32),
    /// Asked for by `EXPORT_NAME`, which has no way to say no.
    #[error("no export is called {0:?}")]
    UnknownExport(String),
    /// Too many options or one that is too long.
    #[error("the client sends more options than make sense")]
    Excess,
}

#[derive(Debug)]
enum State {
    Flags,
    Option,
    /// So many bytes of an option are left to skip.
    Skip(u32),
}

/// One handshake.
///
/// # Contract
/// [`greet`](Self::greet) once, then [`advance`](Self::advance) with all bytes that are there, each
/// time bytes arrive.
#[derive(Debug)]
pub struct Negotiation {
    state: State,
    no_zeroes: bool,
    structured: bool,
    /// The export for which the client chose `base:allocation`.
    allocation_for: Option<String>,
    options: u32,
}

impl Default for Negotiation {
    fn default() -> Self {
        Self::new()
    }
}

impl Negotiation {
    /// A handshake that has not begun.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: State::Flags,
            no_zeroes: false,
            structured: false,
            allocation_for: None,
            options: 0,
        }
    }

    /// Appends the server's greeting.
    pub fn greet(&self, out: &mut Vec<u8>) {
        out.extend(GREETING_MAGIC.to_be_bytes());
        out.extend(OPTION_MAGIC.to_be_bytes());
        out.extend((handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
    }

    /// Takes bytes from the front of `input`, appends answers to `out`. Returns how many bytes were
    /// used, and what was agreed on once that is clear: the bytes after those used then belong to
    /// the transmission phase.
    ///
    /// # Errors
    /// When the connection must be closed, after `out` has been sent.
    pub fn advance(
        &mut self,
        input: &[u8],
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Option<Agreed>), HandshakeError> {
        let mut used = 0;
        loop {
            let (bytes, agreed) = self.step(&input[used..], catalogue, out)?;
            used += bytes;
            if bytes == 0 || agreed.is_some() {
                return Ok((used, agreed));
            }
        }
    }

    fn step(
        &mut self,
        input: &[u8],
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Option<Agreed>), HandshakeError> {
        match self.state {
            State::Flags => {
                let Some(flags) = Reader(input).u32() else {
                    return Ok((0, None));
                };
                let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
                if flags & !known != 0 {
                    return Err(HandshakeError::Flags(flags));
                }
                self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
                self.state = State::Option;
                Ok((4, None))
            }
            State::Skip(left) => {
                let bytes = input.len().min(left as usize);
                let left = left - u32::try_from(bytes).unwrap_or(left);
                self.state = if left == 0 {
                    State::Option
                } else {
                    State::Skip(left)
                };
                Ok((bytes, None))
            }
            State::Option => self.option(input, catalogue, out),
        }
    }

    fn option(
        &mut self,
        input: &[u8],
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Option<Agreed>), HandshakeError> {
        let mut reader = Reader(input);
        if reader.u64().is_some_and(|magic| magic != OPTION_MAGIC) {
            return Err(HandshakeError::Magic);
        }
        let (Some(number), Some(length)) = (reader.u32(), reader.u32()) else {
            return Ok((0, None));
        };
        if length as usize > OPTION_BYTES_MAX {
            if length > OPTION_BYTES_SKIPPED_MAX || number == option::EXPORT_NAME {
                return Err(HandshakeError::Excess);
            }
            self.count_option()?;
            put_reply(out, number, reply::ERR_TOO_BIG, b"the option is too long");
            self.state = State::Skip(length);
            return Ok((OPTION_BYTES, None));
        }
        let Some(data) = reader.bytes(length as usize) else {
            return Ok((0, None));
        };
        self.count_option()?;
        let agreed = self.answer(number, data, catalogue, out)?;
        Ok((OPTION_BYTES + data.len(), agreed))
    }

    fn count_option(&mut self) -> Result<(), HandshakeError> {
        self.options += 1;
        if self.options > OPTIONS_MAX {
            Err(HandshakeError::Excess)
        } else {
            Ok(())
        }
    }

    fn answer(
        &mut self,
        number: u32,
        data: &[u8],
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Result<Option<Agreed>, HandshakeError> {
        match number {
            option::EXPORT_NAME => return self.export_name(data, catalogue, out).map(Some),
            option::ABORT => {
                put_reply(out, number, reply::ACK, &[]);
                return Err(HandshakeError::Aborted);
            }
            option::LIST if data.is_empty() => list(catalogue, out),
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                put_reply(out, number, reply::ACK, &[]);
            }
            option::LIST | option::STRUCTURED_REPLY => {
                put_reply(out, number, reply::ERR_INVALID, b"this option has no data");
            }
            option::INFO | option::GO => return Ok(self.info(number, data, catalogue, out)),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(number, data, catalogue, out);
            }
            _ => put_reply(
                out,
                number,
                reply::ERR_UNSUP,
                b"this server does not know the option",
            ),
        }
        Ok(None)
    }

    fn agree(&self, name: &str, info: ExportInfo) -> Agreed {
        let allocation = self.structured && self.allocation_for.as_deref() == Some(name);
        Agreed {
            name: name.to_owned(),
            info,
            structured: self.structured,
            allocation,
        }
    }

    fn export_name(
        &self,
        data: &[u8],
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Result<Agreed, HandshakeError> {
        let name = String::from_utf8_lossy(data);
        let Some(info) = catalogue.find(&name) else {
            return Err(HandshakeError::UnknownExport(name.into_owned()));
        };
        out.extend(info.size.to_be_bytes());
        out.extend(export_flags(&info, self.structured).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Ok(self.agree(&name, info))
    }

    fn info(
        &self,
        number: u32,
        data: &[u8],
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Option<Agreed> {
        let Some((name, wanted)) = parse_info(data) else {
            put_reply(
                out,
                number,
                reply::ERR_INVALID,
                b"malformed request for information",
            );
            return None;
        };
        let Some(found) = catalogue.find(name) else {
            put_reply(out, number, reply::ERR_UNKNOWN, b"no export has this name");
            return None;
        };
        let mut body = Vec::with_capacity(16);
        body.extend(info::EXPORT.to_be_bytes());
        body.extend(found.size.to_be_bytes());
        body.extend(export_flags(&found, self.structured).to_be_bytes());
        put_reply(out, number, reply::INFO, &body);
        if wanted.contains(&info::NAME) {
            body.clear();
            body.extend(info::NAME.to_be_bytes());
            body.extend(name.as_bytes());
            put_reply(out, number, reply::INFO, &body);
        }
        // Said unasked too: a client that understands it does better requests.
        body.clear();
        body.extend(info::BLOCK_SIZE.to_be_bytes());
        body.extend(found.block_size_min.to_be_bytes());
        body.extend(found.block_size_preferred.to_be_bytes());
        body.extend(found.request_bytes_max.to_be_bytes());
        put_reply(out, number, reply::INFO, &body);
        put_reply(out, number, reply::ACK, &[]);
        (number == option::GO).then(|| self.agree(name, found))
    }

    fn meta_context(
        &mut self,
        number: u32,
        data: &[u8],
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) {
        let is_set = number == option::SET_META_CONTEXT;
        if is_set {
            self.allocation_for = None;
        }
        if !self.structured {
            put_reply(
                out,
                number,
                reply::ERR_INVALID,
                b"structured replies come first",
            );
            return;
        }
        let Some((name, queries)) = parse_meta_context(data) else {
            put_reply(
                out,
                number,
                reply::ERR_INVALID,
                b"malformed list of contexts",
            );
            return;
        };
        if catalogue.find(name).is_none() {
            put_reply(out, number, reply::ERR_UNKNOWN, b"no export has this name");
            return;
        }
        let matches = |query: &&str| *query == BASE_ALLOCATION || (!is_set && *query == "base:");
        if queries.iter().any(matches) || (!is_set && queries.is_empty()) {
            let mut body = Vec::with_capacity(32);
            body.extend(if is_set { BASE_ALLOCATION_ID } else { 0 }.to_be_bytes());
            body.extend(BASE_ALLOCATION.as_bytes());
            put_reply(out, number, reply::META_CONTEXT, &body);
            if is_set {
                self.allocation_for = Some(name.to_owned());
            }
        }
        put_reply(out, number, reply::ACK, &[]);
    }
}

fn parse_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut reader = Reader(data);
    let name = reader.text().filter(|name| name.len() <= NAME_BYTES_MAX)?;
    let count = reader.u16()?;
    // Bounded by the data: each takes two bytes of it.
    let wanted = (0..count)
        .map(|_| reader.u16())
        .collect::<Option<Vec<_>>>()?;
    reader.0.is_empty().then_some((name, wanted))
}

fn parse_meta_context(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut reader = Reader(data);
    let name = reader.text().filter(|name| name.len() <= NAME_BYTES_MAX)?;
    let count = reader.u32()?;
    let queries = (0..count)
        .map(|_| reader.text())
        .collect::<Option<Vec<_>>>()?;
    reader.0.is_empty().then_some((name, queries))
}

fn list(catalogue: &dyn Catalogue, out: &mut Vec<u8>) {
    for name in catalogue.names() {
        let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
        let mut body = length.to_be_bytes().to_vec();
        body.extend(name.as_bytes());
        put_reply(out, option::LIST, reply::SERVER, &body);
    }
    put_reply(out, option::LIST, reply::ACK, &[]);
}

fn export_flags(info: &ExportInfo, structured: bool) -> u16 {
    let mut flags = export::HAS_FLAGS
        | export::SEND_FLUSH
        | export::SEND_FUA
        | export::SEND_TRIM
        | export::SEND_WRITE_ZEROES
        | export::SEND_FAST_ZERO
        | export::CAN_MULTI_CONN
        | export::SEND_CACHE;
    if info.read_only {
        flags |= export::READ_ONLY;
    }
    if structured {
        flags |= export::SEND_DF;
    }
    flags
}

fn put_reply(out: &mut Vec<u8>, number: u32, kind: u32, body: &[u8]) {
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(number.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(body);
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests {
    use super::*;

    struct One;

    impl Catalogue for One {
        fn names(&self) -> Vec<String> {
            vec!["disk".to_owned()]
        }

        fn find(&self, name: &str) -> Option<ExportInfo> {
            (name == "disk").then_some(ExportInfo {
                size: 12345,
                read_only: false,
                block_size_min: 1,
                block_size_preferred: 4096,
                request_bytes_max: 1 << 20,
            })
        }
    }

    fn opt(number: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
    }

    fn go() -> Vec<u8> {
        opt(option::GO, &[text("disk"), vec![0, 0]].concat())
    }

    fn set_context(query: &str) -> Vec<u8> {
        let data = [text("disk"), vec![0, 0, 0, 1], text(query)].concat();
        opt(option::SET_META_CONTEXT, &data)
    }

    /// Feeds `input` byte by byte; what is agreed on, and the types of the answers.
    fn feed(input: &[Vec<u8>]) -> (Result<Option<Agreed>, HandshakeError>, Vec<u32>) {
        let mut negotiation = Negotiation::new();
        let (mut arrived, mut out) = (Vec::new(), Vec::new());
        let mut result = Ok(None);
        for byte in [3u32.to_be_bytes().to_vec()].iter().chain(input).flatten() {
            arrived.push(*byte);
            match negotiation.advance(&arrived, &One, &mut out) {
                Ok((used, agreed)) => {
                    arrived.drain(..used);
                    if agreed.is_some() {
                        result = Ok(agreed);
                        break;
                    }
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        let mut kinds = Vec::new();
        let mut reader = Reader(&out);
        while reader.u64() == Some(OPTION_REPLY_MAGIC) {
            reader.u32().unwrap();
            kinds.push(reader.u32().unwrap());
            let length = reader.u32().unwrap();
            reader.bytes(length as usize).unwrap();
        }
        (result, kinds)
    }

    #[test]
    fn block_status_needs_structured_replies_first_and_the_same_export() {
        let agreed = |input: &[Vec<u8>]| feed(input).0.unwrap().unwrap();
        let structured = opt(option::STRUCTURED_REPLY, &[]);
        let plain = agreed(&[go()]);
        assert!(!plain.structured && !plain.allocation);
        assert!(!agreed(&[set_context(BASE_ALLOCATION), structured.clone(), go()]).allocation);
        assert!(agreed(&[structured.clone(), set_context(BASE_ALLOCATION), go()]).allocation);
        let twice = [
            structured.clone(),
            set_context(BASE_ALLOCATION),
            set_context("x:y"),
            go(),
        ];
        assert!(!agreed(&twice).allocation);
    }

    #[test]
    fn options_are_answered_as_the_protocol_says() {
        let check = |input: Vec<u8>, want: &[u32]| assert_eq!(feed(&[input]).1, want);
        check(opt(option::LIST, &[]), &[reply::SERVER, reply::ACK]);
        check(opt(option::LIST, b"x"), &[reply::ERR_INVALID]);
        check(opt(option::STARTTLS, &[]), &[reply::ERR_UNSUP]);
        check(opt(77, &[1; 99]), &[reply::ERR_UNSUP]);
        check(
            opt(77, &vec![1; OPTION_BYTES_MAX + 1]),
            &[reply::ERR_TOO_BIG],
        );
        let unknown = [text("nothing"), vec![0, 0]].concat();
        check(opt(option::INFO, &unknown), &[reply::ERR_UNKNOWN]);
        check(opt(option::GO, &text("disk")), &[reply::ERR_INVALID]);
        check(go(), &[reply::INFO, reply::INFO, reply::ACK]);
    }

    #[test]
    fn handshakes_that_cannot_go_on_end() {
        let check = |input: Vec<u8>, want| assert_eq!(feed(&[input]).0, Err(want));
        check(opt(option::ABORT, &[]), HandshakeError::Aborted);
        check(b"no option".to_vec(), HandshakeError::Magic);
        let unknown = HandshakeError::UnknownExport("other".to_owned());
        check(opt(option::EXPORT_NAME, b"other"), unknown);
        let endless: Vec<u8> = (0..1001).flat_map(|_| opt(option::LIST, &[])).collect();
        check(endless, HandshakeError::Excess);
        let mut negotiation = Negotiation::new();
        let flags = negotiation.advance(&[0, 1, 0, 3], &One, &mut Vec::new());
        assert_eq!(flags, Err(HandshakeError::Flags(0x1_0003)));
    }
}
