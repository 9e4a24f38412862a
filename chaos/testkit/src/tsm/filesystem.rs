//! The files, for FUSE. Owns: names, modes, sizes, what is buffered until a close, which errno an access gets. Never: decides what a
//! request leads to (the emulated kernel does).
//!
//! `tsm/report/NAME/{generation,provider,inblob,outblob}` and `measurements/{mrtd:sha384,…,rtmr3:sha384}`. Contents are snapshots of
//! the first read of an open file; nothing is cached by the real kernel above (direct I/O, no attribute lifetime).

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, Filesystem, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::kernel::Kernel;

/// One thing that has an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Root,
    Tsm,
    Reports,
    Entry(u64),
    Attribute(u64, Attribute),
    Measurements,
    Register(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attribute {
    Generation,
    Provider,
    Inblob,
    Outblob,
}

const ATTRIBUTES: [(Attribute, &str); 4] = [
    (Attribute::Generation, "generation"),
    (Attribute::Provider, "provider"),
    (Attribute::Inblob, "inblob"),
    (Attribute::Outblob, "outblob"),
];

/// Files below `measurements`; the first four are the runtime registers.
const REGISTERS: [&str; 8] =
    ["rtmr0:sha384", "rtmr1:sha384", "rtmr2:sha384", "rtmr3:sha384", "mrtd:sha384", "mrconfigid", "mrowner", "mrownerconfig"];
const RUNTIME_REGISTERS: usize = 4;

/// Inodes: 1 to 4 and from 16 on are fixed, entries follow.
const ENTRIES_FROM: u64 = 1 << 12;

impl Node {
    fn inode(self) -> u64 {
        match self {
            Self::Root => fuser::FUSE_ROOT_ID,
            Self::Tsm => 2,
            Self::Reports => 3,
            Self::Measurements => 4,
            Self::Register(index) => 16 + index as u64,
            Self::Entry(id) => ENTRIES_FROM + id * 8,
            Self::Attribute(id, attribute) => {
                let index = ATTRIBUTES.iter().position(|(listed, _)| *listed == attribute).unwrap_or_default();
                ENTRIES_FROM + id * 8 + 1 + index as u64
            }
        }
    }

    fn of(inode: u64) -> Option<Self> {
        match inode {
            fuser::FUSE_ROOT_ID => Some(Self::Root),
            2 => Some(Self::Tsm),
            3 => Some(Self::Reports),
            4 => Some(Self::Measurements),
            16..ENTRIES_FROM => usize::try_from(inode - 16).ok().filter(|index| *index < REGISTERS.len()).map(Self::Register),
            _ => {
                let (id, rest) = (inode.checked_sub(ENTRIES_FROM)? / 8, usize::try_from(inode % 8).ok()?);
                match rest.checked_sub(1) {
                    None => Some(Self::Entry(id)),
                    Some(index) => ATTRIBUTES.get(index).map(|(attribute, _)| Self::Attribute(id, *attribute)),
                }
            }
        }
    }

    /// Mode and size as the kernel shows them: 4096 for text, 0 for blobs, 48 for registers.
    fn mode_and_size(self) -> (u16, u64) {
        match self {
            Self::Root | Self::Tsm | Self::Reports | Self::Entry(_) | Self::Measurements => (0o755, 0),
            Self::Attribute(_, Attribute::Generation | Attribute::Provider) => (0o444, 4096),
            Self::Attribute(_, Attribute::Inblob) => (0o200, 0),
            Self::Attribute(_, Attribute::Outblob) => (0o444, 0),
            Self::Register(index) if index < RUNTIME_REGISTERS => (0o644, 48),
            Self::Register(_) => (0o444, 48),
        }
    }

    fn is_directory(self) -> bool {
        !matches!(self, Self::Attribute(..) | Self::Register(_))
    }
}

/// An open file.
struct Handle {
    node: Node,
    /// Snapshot of the first read.
    content: Option<Vec<u8>>,
    /// What was written to a blob and is committed at the close.
    written: Option<Vec<u8>>,
}

/// The file system over one emulated kernel.
pub(super) struct TsmFs {
    kernel: Arc<Mutex<Kernel>>,
    handles: HashMap<u64, Handle>,
    next: u64,
    owner: (u32, u32),
}

impl TsmFs {
    pub(super) fn new(kernel: Arc<Mutex<Kernel>>) -> Self {
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { kernel, handles: HashMap::new(), next: 0, owner }
    }

    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node of an inode, while it exists.
    fn node(&self, inode: u64) -> Result<Node, Errno> {
        let node = Node::of(inode).ok_or(Errno::NOENT)?;
        match node {
            Node::Entry(id) | Node::Attribute(id, _) if !self.kernel().exists(id) => Err(Errno::NOENT),
            node => Ok(node),
        }
    }

    fn child(&self, parent: u64, name: &OsStr) -> Result<Node, Errno> {
        let name = name.to_str().ok_or(Errno::NOENT)?;
        let children = self.children(self.node(parent)?);
        children.into_iter().find(|(_, child)| child == name).map(|(node, _)| node).ok_or(Errno::NOENT)
    }

    fn children(&self, node: Node) -> Vec<(Node, String)> {
        match node {
            Node::Root => vec![(Node::Tsm, "tsm".to_owned()), (Node::Measurements, "measurements".to_owned())],
            Node::Tsm => vec![(Node::Reports, "report".to_owned())],
            Node::Reports => self.kernel().entries().map(|(id, name)| (Node::Entry(id), name.to_owned())).collect(),
            Node::Entry(id) => ATTRIBUTES.iter().map(|(attribute, name)| (Node::Attribute(id, *attribute), (*name).to_owned())).collect(),
            Node::Measurements => REGISTERS.iter().enumerate().map(|(index, name)| (Node::Register(index), (*name).to_owned())).collect(),
            Node::Attribute(..) | Node::Register(_) => Vec::new(),
        }
    }

    fn attr(&self, node: Node) -> FileAttr {
        let (perm, size) = node.mode_and_size();
        let kind = if node.is_directory() { FileType::Directory } else { FileType::RegularFile };
        let (uid, gid) = self.owner;
        let time = UNIX_EPOCH;
        FileAttr {
            ino: node.inode(),
            size,
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm,
            nlink: 1,
            uid,
            gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// configfs and sysfs refuse an access that the mode does not name, also for root.
    fn open_handle(&mut self, inode: u64, flags: i32) -> Result<u64, Errno> {
        let node = self.node(inode)?;
        let (mode, _) = node.mode_and_size();
        let access = OFlags::from_bits_retain(flags.cast_unsigned()) & OFlags::RWMODE;
        let reads = access != OFlags::WRONLY;
        let writes = access == OFlags::WRONLY || access == OFlags::RDWR;
        if (reads && mode & 0o444 == 0) || (writes && mode & 0o222 == 0) {
            return Err(Errno::ACCESS);
        }
        self.next += 1;
        self.handles.insert(self.next, Handle { node, content: None, written: None });
        Ok(self.next)
    }

    fn read_handle(&mut self, fh: u64, offset: i64, size: u32) -> Result<Vec<u8>, Errno> {
        let handle = self.handles.get(&fh).ok_or(Errno::BADF)?;
        if handle.content.is_none() {
            let content = self.content(handle.node)?;
            self.handles.get_mut(&fh).ok_or(Errno::BADF)?.content = Some(content);
        }
        let content = self.handles.get(&fh).and_then(|handle| handle.content.as_deref()).unwrap_or_default();
        let from = usize::try_from(offset).map_err(|_| Errno::INVAL)?.min(content.len());
        let until = from.saturating_add(size as usize).min(content.len());
        Ok(content.get(from..until).unwrap_or_default().to_vec())
    }

    fn content(&self, node: Node) -> Result<Vec<u8>, Errno> {
        match node {
            Node::Attribute(id, Attribute::Generation) => Ok(format!("{}\n", self.kernel().generation(id)?).into_bytes()),
            Node::Attribute(id, Attribute::Provider) => {
                let kernel = self.kernel();
                kernel.generation(id)?;
                kernel.provider.as_ref().map(|name| format!("{name}\n").into_bytes()).ok_or(Errno::NOTTY)
            }
            Node::Attribute(id, Attribute::Outblob) => {
                let (outblob, time) = self.kernel().outblob(id);
                std::thread::sleep(time);
                outblob
            }
            Node::Register(index) => {
                let kernel = self.kernel();
                let report = kernel.td.report();
                let others = [&report.mrtd, &report.mr_config_id, &report.mr_owner, &report.mr_owner_config];
                let register = report.rtmr.get(index).or_else(|| others.get(index - RUNTIME_REGISTERS).copied());
                register.map(|register| register.to_vec()).ok_or(Errno::NOENT)
            }
            Node::Attribute(_, Attribute::Inblob) => Err(Errno::ACCESS),
            Node::Root | Node::Tsm | Node::Reports | Node::Entry(_) | Node::Measurements => Err(Errno::ISDIR),
        }
    }

    fn write_handle(&mut self, fh: u64, offset: i64, data: &[u8]) -> Result<(), Errno> {
        let handle = self.handles.get_mut(&fh).ok_or(Errno::BADF)?;
        let offset = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
        match handle.node {
            Node::Attribute(_, Attribute::Inblob) => {
                let end = offset.saturating_add(data.len());
                if end > INBLOB_BYTES_MAX {
                    return Err(Errno::FBIG);
                }
                let written = handle.written.get_or_insert_default();
                written.resize(written.len().max(end), 0);
                written.get_mut(offset..end).ok_or(Errno::INVAL)?.copy_from_slice(data);
                Ok(())
            }
            Node::Register(index) => {
                let digest: &[u8; 48] = data.try_into().map_err(|_| Errno::INVAL)?;
                let extended = offset == 0 && index < RUNTIME_REGISTERS && self.kernel().td.extend(index, digest);
                if extended { Ok(()) } else { Err(Errno::INVAL) }
            }
            _ => Err(Errno::ACCESS),
        }
    }

    /// What configfs does at the close of the file. Done in `flush`, which `close` waits for; `release` comes later.
    fn commit(&mut self, fh: u64) {
        let Some(handle) = self.handles.get_mut(&fh) else { return };
        if let (Node::Attribute(id, Attribute::Inblob), Some(inblob)) = (handle.node, handle.written.take()) {
            self.kernel().commit(id, inblob);
        }
    }

    fn make(&self, parent: u64, name: &OsStr) -> Result<Node, Errno> {
        match self.node(parent)? {
            Node::Reports => self.kernel().mkdir(name.to_str().ok_or(Errno::INVAL)?).map(Node::Entry),
            _ => Err(Errno::PERM),
        }
    }

    fn remove(&self, parent: u64, name: &OsStr) -> Result<(), Errno> {
        match self.child(parent, name)? {
            Node::Entry(id) => self.kernel().rmdir(id),
            _ => Err(Errno::PERM),
        }
    }
}

impl Filesystem for TsmFs {
    fn lookup(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEntry) {
        match self.child(parent, name) {
            Ok(node) => reply.entry(&NO_LIFETIME, &self.attr(node), 0),
            Err(errno) => reply.error(errno.raw_os_error()),
        }
    }

    fn getattr(&mut self, _: &Request<'_>, inode: u64, _: Option<u64>, reply: ReplyAttr) {
        match self.node(inode) {
            Ok(node) => reply.attr(&NO_LIFETIME, &self.attr(node)),
            Err(errno) => reply.error(errno.raw_os_error()),
        }
    }

    /// Truncation at an open changes nothing, as in configfs.
    fn setattr(
        &mut self,
        request: &Request<'_>,
        inode: u64,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<fuser::TimeOrNow>,
        _mtime: Option<fuser::TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<u64>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<u32>,
        reply: ReplyAttr,
    ) {
        self.getattr(request, inode, None, reply);
    }

    fn mkdir(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        match self.make(parent, name) {
            Ok(node) => reply.entry(&NO_LIFETIME, &self.attr(node), 0),
            Err(errno) => reply.error(errno.raw_os_error()),
        }
    }

    fn rmdir(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEmpty) {
        match self.remove(parent, name) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno.raw_os_error()),
        }
    }

    fn unlink(&mut self, _: &Request<'_>, _parent: u64, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::PERM.raw_os_error());
    }

    fn mknod(&mut self, _: &Request<'_>, _parent: u64, _name: &OsStr, _mode: u32, _umask: u32, _rdev: u32, reply: ReplyEntry) {
        reply.error(Errno::PERM.raw_os_error());
    }

    fn open(&mut self, _: &Request<'_>, inode: u64, flags: i32, reply: ReplyOpen) {
        match self.open_handle(inode, flags) {
            Ok(fh) => reply.opened(fh, fuser::consts::FOPEN_DIRECT_IO),
            Err(errno) => reply.error(errno.raw_os_error()),
        }
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        _inode: u64,
        fh: u64,
        offset: i64,
        size: u32,
        _flags: i32,
        _lock_owner: Option<u64>,
        reply: ReplyData,
    ) {
        match self.read_handle(fh, offset, size) {
            Ok(data) => reply.data(&data),
            Err(errno) => reply.error(errno.raw_os_error()),
        }
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        _inode: u64,
        fh: u64,
        offset: i64,
        data: &[u8],
        _write_flags: u32,
        _flags: i32,
        _lock_owner: Option<u64>,
        reply: ReplyWrite,
    ) {
        match self.write_handle(fh, offset, data) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(errno) => reply.error(errno.raw_os_error()),
        }
    }

    fn flush(&mut self, _: &Request<'_>, _inode: u64, fh: u64, _lock_owner: u64, reply: ReplyEmpty) {
        self.commit(fh);
        reply.ok();
    }

    fn release(&mut self, _: &Request<'_>, _inode: u64, fh: u64, _flags: i32, _lock_owner: Option<u64>, _flush: bool, reply: ReplyEmpty) {
        self.commit(fh);
        self.handles.remove(&fh);
        reply.ok();
    }

    fn readdir(&mut self, _: &Request<'_>, inode: u64, _fh: u64, offset: i64, mut reply: ReplyDirectory) {
        let node = match self.node(inode) {
            Ok(node) => node,
            Err(errno) => return reply.error(errno.raw_os_error()),
        };
        for (index, (child, name)) in (1i64..).zip(self.children(node)) {
            let kind = if child.is_directory() { FileType::Directory } else { FileType::RegularFile };
            if index > offset && reply.add(child.inode(), index, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}

/// The real kernel above asks every time.
const NO_LIFETIME: Duration = Duration::ZERO;
const INBLOB_BYTES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inodes_name_one_node_each() {
        let mut nodes = vec![Node::Root, Node::Tsm, Node::Reports, Node::Measurements];
        nodes.extend((0..REGISTERS.len()).map(Node::Register));
        for id in [1, 2, 77] {
            nodes.push(Node::Entry(id));
            nodes.extend(ATTRIBUTES.map(|(attribute, _)| Node::Attribute(id, attribute)));
        }
        for node in &nodes {
            assert_eq!(Node::of(node.inode()), Some(*node));
        }
        assert_eq!(Node::of(5), None);
        assert_eq!(Node::of(ENTRIES_FROM + 15), None);
    }
}
